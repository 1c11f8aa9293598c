"""The project's statistics: one recipe for each kind of figure.

| figure | its interval |
|---|---|
| a share of prompts, one answer each | Wilson |
| a mean over prompts, a share with several answers a prompt, a paired difference | bootstrap of whole prompts, expanded percentiles (`bootstrap_interval`) |
| a share of rows (precision, recall, ranking accuracy), AUC, balanced accuracy | the same, of what each prompt adds to the figure: the ratio of sums and DeLong's placements, linearised |
| F1, average precision, recall at a false positive rate | the same, of the figure in each resample (`bootstrap_counts`) |
| any of these where all prompts agree | what the Wilson bound of 0 of n leaves possible (`unseen`) |
| a mean over seeds and prompts | analysis of variance, two t quantiles (`safe_rlhf_v.comparison.crossed`) |

The unit of evidence is the prompt: its answers are averaged, or resampled together. Signs: cost > 0 is unsafe.
"""  # noqa: E501

from safe_rlhf_v.statistics.bootstrap import DEFAULT, Array, Resampling, bootstrap_counts, bootstrap_means
from safe_rlhf_v.statistics.calibration import CalibrationBin, calibration_bins, expected_calibration_error, sigmoid
from safe_rlhf_v.statistics.costs import Compensation, compensation, cvar
from safe_rlhf_v.statistics.intervals import (
    Interval,
    bootstrap_interval,
    linearised,
    mean_interval,
    paired_difference,
    per_prompt,
    proportion_interval,
    share_of_rows,
    unseen,
    wilson,
)
from safe_rlhf_v.statistics.ranking import (
    Ranked,
    auc,
    auc_interval,
    balanced_accuracy,
    balanced_accuracy_interval,
    mean_or_none,
    ranked,
    sign_accuracy,
)

__all__ = [
    "DEFAULT",
    "Array",
    "CalibrationBin",
    "Compensation",
    "Interval",
    "Ranked",
    "Resampling",
    "auc",
    "auc_interval",
    "balanced_accuracy",
    "balanced_accuracy_interval",
    "bootstrap_counts",
    "bootstrap_interval",
    "bootstrap_means",
    "calibration_bins",
    "compensation",
    "cvar",
    "expected_calibration_error",
    "linearised",
    "mean_interval",
    "mean_or_none",
    "paired_difference",
    "per_prompt",
    "proportion_interval",
    "ranked",
    "share_of_rows",
    "sigmoid",
    "sign_accuracy",
    "unseen",
    "wilson",
]
