"""Taxonomies of harm: one YAML file each, with its version. `beavertails_v.taxonomy` reads them."""
