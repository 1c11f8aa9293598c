"""The problem of `iterative` for a vision-language model: samples of the reference, pairs relabelled by r + lam.g, DPO.

Folders: reference.pt and pairs.pt hold samples of the reference, iteration-<n>/ the policy of an iteration with its
samples.pt. What is there is not made again. N prompts, G samples a prompt, K constraints.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beavertails_v.schema import Comparison, Prompt, Response
from beavertails_v.taxonomy import Taxonomy
from safe_rlhf_v.algorithms.caid import Measured, dual_rates, measure, pseudo_labels
from safe_rlhf_v.algorithms.can import OneShot, OneShotSolution
from safe_rlhf_v.algorithms.dpo import DPO
from safe_rlhf_v.config import IterativeSection, SettingsError
from safe_rlhf_v.direct.train import train_direct
from safe_rlhf_v.iterative.samples import PreferenceScorer, Sampled, draw, kept
from safe_rlhf_v.roles.scorers import ModelScorer, Scorer
from safe_rlhf_v.roles.separate import SeparateRoles, same_tokens
from safe_rlhf_v.training.setup import Setup
from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.processing import Encoder, load_processor

ALL = "all"
HELD_OUT = 0.05  # share of the pairs that DPO is measured on


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """One constraint a name: "all" for the mean over every prompt, a primary category for the mean over its own.

    shares: of the prompts that are measured on; a category's gain is divided by it, so that the mean over all prompts
    is the category's mean.
    """

    names: tuple[str, ...]
    bounds: tuple[float, ...]
    shares: tuple[float, ...]

    @classmethod
    def over(cls, bounds: float | Mapping[str, float], prompts: Sequence[Prompt]) -> Constraints:
        """Raises SettingsError for a name that is no primary category, or of which no prompt is measured on."""
        wanted = dict(bounds) if isinstance(bounds, Mapping) else {ALL: float(bounds)}
        primary = Taxonomy.load().primary
        unknown = sorted(set(wanted) - {ALL, *primary})
        if unknown or not wanted:
            raise SettingsError(
                f"iterative.bounds: {unknown or 'nothing'}; give {ALL!r} or primary categories: {', '.join(primary)}"
            )
        shares = {name: sum(_belongs(p, name) for p in prompts) / len(prompts) for name in wanted}
        if none := [name for name, share in shares.items() if not share]:
            raise SettingsError(f"iterative.bounds: none of {len(prompts)} prompts is of {none[0]!r}; leave it out")
        return cls(names=tuple(wanted), bounds=tuple(wanted.values()), shares=tuple(shares.values()))

    def gains(self, costs: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(N, G, K) g = -cost where the prompt belongs to the constraint, over its share; else 0."""
        weights = [[_belongs(p, n) / s for n, s in zip(self.names, self.shares, strict=True)] for p in prompts]
        return -costs[..., None] * torch.tensor(weights)[:, None]


def _belongs(prompt: Prompt, name: str) -> bool:
    return name == ALL or (prompt.category is not None and Taxonomy.load().primary_of(prompt.category) == name)


class ModelProblem:
    """start: the reference, a model folder. sources: reward and cost model, or pi_r and pi_g of the preference-based
    algorithms. prompts: of the training data, all of which the model can read. demonstrations: the training data, whose
    responses iterative.ptx_coeff imitates.
    """

    def __init__(
        self,
        section: IterativeSection,
        setup: Setup,
        folder: Path,
        start: str | Path,
        sources: tuple[str | Path, str | Path],
        prompts: Sequence[Prompt],
        device: torch.device | str = "cpu",
        demonstrations: Sequence[Comparison] = (),
    ) -> None:
        self.section, self.setup, self.folder = section, setup, folder
        self.start, self.sources, self.device = Path(start), sources, device
        self.demonstrations = demonstrations
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(setup.seed)).tolist()
        held_out, trained = order[: self.section.prompts], order[self.section.prompts :][: self.section.pair_prompts]
        if not trained:
            raise SettingsError(
                f"iterative.prompts = {self.section.prompts} leaves none of {len(prompts)} prompts to train on: "
                "policies are measured, and the best one picked, on prompts that were not trained on; lower it"
            )
        self.measured_on, self.trained_on = [prompts[i] for i in held_out], [prompts[i] for i in trained]
        self.constraints = Constraints.over(self.section.bounds, self.measured_on)

    @property
    def names(self) -> tuple[str, ...]:
        return self.constraints.names

    @property
    def bounds(self) -> Tensor:
        return torch.tensor(self.constraints.bounds, dtype=torch.float64)

    def policy(self, iteration: int) -> Path:
        """Folder of an iteration's policy; that of 0 is the reference."""
        return self.folder / f"iteration-{iteration}" if iteration else self.start

    def base_of(self, iteration: int) -> Path:
        """The model that an iteration's training begins with."""
        return self.policy(iteration - 1 if self.section.start_from == "previous" else 0)

    def one_shot(self) -> tuple[OneShotSolution, list[float]]:
        found = self._samples(0)
        gains = self.constraints.gains(found.costs, self.measured_on)
        solution = OneShot(beta=self.section.beta).solve(found.rewards, gains, self.bounds)
        if solution.verdict == "infeasible":
            return solution, []
        return solution, dual_rates(solution, found.rewards, gains, self.bounds, self.section.beta)

    def reference_cost(self) -> float:
        """Mean cost of the reference on the prompts that are measured on."""
        return float(self._samples(0).costs.double().mean())

    def fit(self, multipliers: Sequence[float], iteration: int) -> None:
        folder = self.policy(iteration)
        if (folder / "metrics.json").is_file():
            return
        pairs = self.pairs(multipliers, iteration)
        few = max(1, int(HELD_OUT * len(pairs)))
        train, held_out = pairs[:-few], pairs[-few:]
        base = self.base_of(iteration)
        reference = None if base == self.start else self.start
        where: Any = (base, folder, self.section, self.setup, reference)
        train_direct(DPO(beta=self.section.beta), train, held_out, *where, demonstrations=self.demonstrations)
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)

    def pairs(self, multipliers: Sequence[float], iteration: int) -> list[Comparison]:
        """Samples of one prompt two by two, `more_helpful` the one of higher r + lam.g, drawn as `pseudo_labels` says.

        Left out: pairs of equal texts, and responses cut off by max_new_tokens, which end nowhere.
        """
        found = self._pair_samples(iteration)
        gains = self.constraints.gains(found.costs, self.trained_on)
        generator = torch.Generator().manual_seed(self._seed(iteration, 2))
        labels = pseudo_labels(
            found.rewards.reshape(-1, 2), gains.reshape(-1, 2, gains.shape[-1]), torch.tensor(multipliers), generator
        ).view(len(self.trained_on), -1)  # (N, G/2)
        pairs = []
        for i, prompt in enumerate(self.trained_on):
            for j in range(labels.shape[1]):
                two = slice(2 * j, 2 * j + 2)
                first, second = found.texts[i][two]
                if first != second and bool(found.ended[i, two].all()):
                    pairs.append(_comparison(prompt, (first, second), found.costs[i, two], int(labels[i, j])))
        return pairs

    def measure(self, multipliers: Sequence[float], iteration: int) -> Measured:
        found, reference = self._samples(iteration), self._samples(0)
        gains, of_ref = (self.constraints.gains(x.costs, self.measured_on) for x in (found, reference))
        lam, beta = torch.tensor(multipliers), self.section.beta
        return measure(
            found.rewards, gains, found.log_ratios, of_ref.mean(1), self.bounds, lam, beta, (reference.rewards, of_ref)
        )

    def _samples(self, iteration: int) -> Sampled:
        path = self.policy(iteration) / "samples.pt" if iteration else self.folder / "reference.pt"
        return kept(
            path, lambda: self._generate(iteration, self.measured_on, self.section.samples, self._seed(iteration, 0))
        )

    def _pair_samples(self, iteration: int) -> Sampled:
        of = iteration - 1 if self.section.pairs_from == "policy" else 0
        path = self.policy(of) / "pairs.pt" if of else self.folder / "pairs.pt"
        return kept(path, lambda: self._generate(of, self.trained_on, self.section.pair_samples, self._seed(of, 1)))

    def _seed(self, iteration: int, purpose: int) -> int:
        return self.setup.seed + 7919 * (3 * iteration + purpose + 1)

    def _generate(self, iteration: int, prompts: Sequence[Prompt], samples: int, seed: int) -> Sampled:
        section, model = self.section, self.setup.model
        load: dict[str, Any] = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
        load["device"] = self.device
        reference = load_backbone(self.start, **load)
        policy = load_backbone(self.policy(iteration), **load) if iteration else reference
        encoder = Encoder(load_processor(self.start), model.max_prompt_length, config=policy.config)
        for folder in self.sources:
            same_tokens(encoder.tokenizer, folder)
        scorer: Scorer
        if section.method.from_preferences:
            helpful, safe = (SeparateRoles(load_backbone(x, **load), reference, {}, encoder) for x in self.sources)
            scorer, roles = PreferenceScorer(helpful, safe, section.beta), SeparateRoles(policy, reference, {}, encoder)
        else:
            scorers = {
                kind: HeadedModel.from_pretrained(folder, **load)
                for kind, folder in zip(("reward", "cost"), self.sources, strict=True)
            }
            roles = SeparateRoles(policy, reference, scorers, encoder)
            scorer = ModelScorer(roles)
        return draw(
            roles,
            scorer,
            prompts,
            samples,
            max_new_tokens=section.max_new_tokens,
            rows_at_once=section.rows_at_once,
            seed=seed,
            device=self.device,
        )


def _comparison(prompt: Prompt, texts: tuple[str, str], costs: Tensor, label: int) -> Comparison:
    """`safer` and `safe` by the cost source; only metrics read them."""
    first, second = (Response(text=t, safe=c <= 0) for t, c in zip(texts, costs.tolist(), strict=True))
    return Comparison(prompt=prompt, responses=(first, second), more_helpful=label, safer=int(costs[1] < costs[0]))


def save_best(source: Path, folder: Path, dtype: str) -> None:
    """The best iterate as a whole model with its processor, so that `folder` itself loads."""
    load_backbone(source, dtype=dtype).save_pretrained(folder)
    load_processor(source).save_pretrained(folder)
