"""What every training shares, whatever it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from safe_rlhf_v.config import DataSection, ModelSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """model: how the base is loaded, its adapters, the lengths that rows may have. data: what loading looked at and
    kept. seed: of weights, data order and sampling."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    seed: int = 0

    @property
    def opens_pictures(self) -> bool:
        """Whether training rows are read in full before the first step: loading has opened no picture."""
        return self.data.check_images == "header"
