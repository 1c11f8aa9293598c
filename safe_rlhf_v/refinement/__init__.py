"""Feedback refinement: student-teacher dialogues over picture questions, and what they achieve (FIRE, NeurIPS 2024)."""

from safe_rlhf_v.refinement.formats import FIRE, WORDS, Format, Review
from safe_rlhf_v.refinement.metrics import Refinement, refinement
from safe_rlhf_v.refinement.model_teacher import ModelTeacher
from safe_rlhf_v.refinement.oracle_teacher import OracleTeacher, ground_truth
from safe_rlhf_v.refinement.protocol import Case, Rules, run_dialogues

__all__ = [
    "FIRE",
    "WORDS",
    "Case",
    "Format",
    "ModelTeacher",
    "OracleTeacher",
    "Refinement",
    "Review",
    "Rules",
    "ground_truth",
    "refinement",
    "run_dialogues",
]
