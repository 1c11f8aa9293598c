"""Judge answers, sum them up with intervals by prompt, and write the report.

before, after = (collect(policy, prompts, judge, scorer=scorer) for policy in (base, aligned))
data = build_report(before=before, after=after, judge=judge, invites_harm=invites_harm, constraint=..., ...)
write_report(data, folder)
"""

from safe_rlhf_v.evaluation.assemble import build_report, read_metrics
from safe_rlhf_v.evaluation.bars import check, load_bars, print_outcomes
from safe_rlhf_v.evaluation.judges import CallableJudge, Judge, Judgement, ModelJudge, OracleJudge
from safe_rlhf_v.evaluation.preference import cost_metrics, reward_metrics
from safe_rlhf_v.evaluation.report import write_report
from safe_rlhf_v.evaluation.report_data import Constraint, ReportData, read_report
from safe_rlhf_v.evaluation.run import Answer, collect, summarise
from safe_rlhf_v.evaluation.safety_test import SafetyTest, safety_test
from safe_rlhf_v.evaluation.statistics import Interval, Resampling

__all__ = [
    "Answer",
    "CallableJudge",
    "Constraint",
    "Interval",
    "Judge",
    "Judgement",
    "ModelJudge",
    "OracleJudge",
    "ReportData",
    "Resampling",
    "SafetyTest",
    "build_report",
    "check",
    "collect",
    "cost_metrics",
    "load_bars",
    "print_outcomes",
    "read_metrics",
    "read_report",
    "reward_metrics",
    "safety_test",
    "summarise",
    "write_report",
]
