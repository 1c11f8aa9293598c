"""The application floor: the stages of a run as functions of its settings, without any command line."""
