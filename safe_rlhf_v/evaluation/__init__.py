"""Judge answers, sum them up with intervals by prompt, and write the report.

benchmark = Benchmark(name="mine", prompts=prompts, judge=judge)
before, after = (collect(policy, benchmark, scorer=scorer) for policy in (base, aligned))
data = build_report(before=before, after=after, benchmark=benchmark, constraint=..., ...)
write_report(data, folder)
"""

from safe_rlhf_v.evaluation.assemble import build_report, read_metrics
from safe_rlhf_v.evaluation.bars import check, load_bars, print_outcomes
from safe_rlhf_v.evaluation.benchmarks import Benchmark, benchmark_of
from safe_rlhf_v.evaluation.judges import CallableJudge, Judge, Judgement, ModelJudge, OracleJudge
from safe_rlhf_v.evaluation.preference import cost_metrics, reward_metrics
from safe_rlhf_v.evaluation.report import write_report
from safe_rlhf_v.evaluation.report_data import Constraint, ReportData, read_report
from safe_rlhf_v.evaluation.run import Answer, collect, summarise
from safe_rlhf_v.evaluation.safety_test import SafetyTest, safety_test
from safe_rlhf_v.statistics import Interval, Resampling

__all__ = [
    "Answer",
    "Benchmark",
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
    "benchmark_of",
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
