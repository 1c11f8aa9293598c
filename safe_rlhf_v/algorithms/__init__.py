"""The methods by their names in settings: `policy.algorithm`, `direct.algorithm`, `iterative.algorithm`.

Each is a class of a file of its own. A name in a table is all that the settings, the commands and the loops know of it;
the first of a table is the one that is taken where none is named.
"""

from safe_rlhf_v.algorithms.bfpo import BFPO
from safe_rlhf_v.algorithms.c_dpo import CDPO
from safe_rlhf_v.algorithms.can import Dualisation
from safe_rlhf_v.algorithms.constrained import Online
from safe_rlhf_v.algorithms.crpo import CRPO
from safe_rlhf_v.algorithms.dpo import DPO
from safe_rlhf_v.algorithms.group_lag import GroupLag
from safe_rlhf_v.algorithms.imitation import Imitation
from safe_rlhf_v.algorithms.kto import KTO
from safe_rlhf_v.algorithms.mm_dpo import MMDPO
from safe_rlhf_v.algorithms.p3o import P3O
from safe_rlhf_v.algorithms.ppo_lag import PPOLag
from safe_rlhf_v.algorithms.repo import RePO
from safe_rlhf_v.algorithms.rloo_lag import RLOOLag
from safe_rlhf_v.algorithms.sacpo import SACPO
from safe_rlhf_v.algorithms.safe_dpo import SafeDPO

ONLINE: dict[str, type[Online]] = {
    "ppo_lag": PPOLag,
    "group_lag": GroupLag,
    "rloo_lag": RLOOLag,
    "repo": RePO,
    "crpo": CRPO,
    "p3o": P3O,
    "imitation": Imitation,
}
DIRECT: dict[str, type] = {
    "dpo": DPO,
    "kto": KTO,
    "sacpo": SACPO,
    "safe_dpo": SafeDPO,
    "bfpo": BFPO,
    "c_dpo": CDPO,
    "mm_dpo": MMDPO,
}
ITERATIVE = {
    "caid": Dualisation(words="multipliers found on samples, with reward and cost model, several times"),
    "pecaid": Dualisation(words="the same with two DPO policies in their place", from_preferences=True),
    "mocan": Dualisation(words="as caid, once", one_shot=True),
    "pecan": Dualisation(words="as pecaid, once", one_shot=True, from_preferences=True),
}
