"""What all methods of a comparison share: data, the model they start from, a reward and a cost model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safe_rlhf_v.comparison.planned import PlannedRun
from safe_rlhf_v.comparison.runs import REFERENCE
from safe_rlhf_v.comparison.settings import CompareSettings, flat_overrides
from safe_rlhf_v.config import Settings, SettingsError, load_settings
from safe_rlhf_v.demo.quickstart import quickstart_settings
from safe_rlhf_v.jobs.scheduler import Job
from safe_rlhf_v.stages.folder import read_done

CLI = (sys.executable, "-m", "safe_rlhf_v.cli")


@dataclass(frozen=True)
class Base:
    """settings: of every run before its method's own; file: where they are saved, for the runs to stand on."""

    settings: Settings
    file: Path

    @property
    def folder(self) -> Path:
        return Path(self.settings.output_dir)

    @cached_property
    def stages(self) -> list[str]:
        """Those that have to be done first: whose models the settings do not name."""
        policy = self.settings.policy
        given = {"sft": self.settings.model.start, "reward": policy.reward_model, "cost": policy.cost_model}
        return [stage for stage, path in given.items() if not path]

    @cached_property
    def jobs(self) -> list[Job]:
        """sft, then reward and cost beside each other, where they are not given."""
        return [
            Job(
                name=f"base {stage}",
                kind=stage,
                command=[*CLI, "train", stage, "--config", str(self.folder / "run.yaml")],
                log=self.folder / f"{stage}.log",
                done=lambda stage=stage: read_done(self.folder / stage) is not None,  # type: ignore[misc]
                after=["base sft"] if stage != "sft" and "sft" in self.stages else [],
            )
            for stage in self.stages
        ]

    @cached_property
    def shared(self) -> list[str]:
        """Overrides that give every stage the base's start, reward and cost model."""
        policy, start = self.settings.policy, self.settings.model.start
        models = {kind: getattr(policy, f"{kind}_model") or str(self.folder / kind) for kind in ("reward", "cost")}
        overrides = [f"model.start={start or self.folder / 'sft'}"]
        for section, info in Settings.model_fields.items():
            known = getattr(info.annotation, "model_fields", {})
            overrides += [f"{section}.{k}_model={path}" for k, path in models.items() if f"{k}_model" in known]
        return overrides

    def reference(self) -> PlannedRun:
        """The model that all methods start from, to be measured as they are."""
        shared = load_settings(self.file, self.shared)
        return PlannedRun(
            method=REFERENCE,
            title="start model",
            stage="",
            seed=shared.seed,
            folder=self.folder / "reference",
            settings=shared,
            model=str(shared.model.start),
        )


def base_of(compare: CompareSettings, file: Path | None = None) -> Base:
    """The base, saved to a file, else to <output_dir>/base/run.yaml. Model and data below <output_dir>/base where the
    settings name none. Raises SettingsError where only the picture world could give them.
    """
    overrides = [*flat_overrides(compare.base), f"output_dir={Path(compare.output_dir, 'base')}"]
    if compare.settings == "quickstart":
        settings = quickstart_settings(None, overrides)
    else:
        settings = load_settings(compare.settings, overrides)
        for name, value in (("model.path", settings.model.path), ("data.path", settings.data.path)):
            if not value:
                raise SettingsError(f"{compare.settings}: {name} is not set; the picture world is for quickstart alone")
    base = Base(settings, file or Path(settings.output_dir, "run.yaml"))
    settings.save(base.file)
    return base
