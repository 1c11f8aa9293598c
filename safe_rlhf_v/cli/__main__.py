"""For launchers that want a module: `accelerate launch -m safe_rlhf_v.cli train reward --config run.yaml`."""

from safe_rlhf_v.cli import app

app()
