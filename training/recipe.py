"""Every number that was chosen, in one place. `RECIPE` made the weights that ship; `SMOKE` proves the code runs."""

from dataclasses import dataclass, replace

from training.model import ModelShape


@dataclass(frozen=True)
class TrainPlan:
    """How one model is trained."""

    epochs: int
    rows_per_step: int = 16
    window: int = 1024
    muon_lr: float = 0.02  # 0: AdamW trains the matrices too
    adam_lr: float = 2e-3
    weight_decay: float = 0.4  # of the matrices, times the learning rate, each step
    embedding_decay: float = 0.1
    warmup_share: float = 0.03
    chat_share: float = 0.4  # of the stories of an epoch that are shown as a chat
    core_epochs: int = 0  # the last epochs, while the learning rate falls, on the core sources only
    hard_weight: float = 1.0  # weight of the true next token; the rest is the weight of the teachers' distribution
    seed: int = 1


@dataclass(frozen=True)
class Candidate:
    name: str
    shape: ModelShape
    plan: TrainPlan


@dataclass(frozen=True)
class PoolPlan:
    """What the students learn from: the text several times over, and the stories that the teachers wrote."""

    text_epochs: int = 3
    plain_stories: int = 16_384
    chats: int = 16_384
    max_tokens: int = 512  # a generated story that has not ended by then is thrown away
    batch: int = 2048
    plain_temperature: float = 1.0
    chat_temperature: float = 0.8
    top: int = 32  # next tokens whose probabilities are kept; the rest is kept as one sum


@dataclass(frozen=True)
class Recipe:
    vocab_size: int
    num_chats: int  # ways in which each story is asked for
    comparisons: tuple[Candidate, ...]  # trained on the text alone, only to be compared with
    teachers: tuple[Candidate, ...]
    pool: PoolPlan
    students: tuple[Candidate, ...]  # the one with the lowest validation loss ships
    draft: Candidate

    def find(self, name: str) -> Candidate:
        everyone = (*self.comparisons, *self.teachers, *self.students, self.draft)
        return next(candidate for candidate in everyone if candidate.name == name)


STUDENT = ModelShape()  # 10.1 M parameters
DEEP_STUDENT = replace(STUDENT, num_layers=8, mlp_dim=576)  # as many parameters, in more and thinner layers
TEACHER = ModelShape(dim=640, num_layers=8, num_heads=10, num_kv_heads=5, mlp_dim=1792, dropout=0.3)  # 40 M
DRAFT = ModelShape(dim=128, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=384)  # 0.9 M parameters


def _teacher(seed: int, dropout: float, weight_decay: float) -> Candidate:
    plan = TrainPlan(epochs=17, weight_decay=weight_decay, seed=seed)
    return Candidate(f"teacher-{seed}", replace(TEACHER, dropout=dropout), plan)


RECIPE = Recipe(
    vocab_size=4096,
    num_chats=4,
    comparisons=(
        Candidate("adamw-10m", replace(STUDENT, dropout=0.2), TrainPlan(16, muon_lr=0.0, weight_decay=0.1)),
        Candidate("muon-10m", replace(STUDENT, dropout=0.2), TrainPlan(16)),
        Candidate("muon-10m-core", replace(STUDENT, dropout=0.2), TrainPlan(16, core_epochs=4)),
        Candidate("large-wd0.4", TEACHER, TrainPlan(16)),
        Candidate("large-wd1.2", TEACHER, TrainPlan(16, weight_decay=1.2)),
        Candidate("large-wd1.2-drop0.1", replace(TEACHER, dropout=0.1), TrainPlan(16, weight_decay=1.2)),
    ),
    # Four that differ in how they are held back from learning the text by heart, so that their mistakes differ too.
    teachers=(_teacher(1, 0.3, 0.4), _teacher(2, 0.3, 0.2), _teacher(3, 0.4, 0.2), _teacher(4, 0.4, 0.1)),
    pool=PoolPlan(),
    students=(
        Candidate("student-wide", STUDENT, TrainPlan(16, weight_decay=0.1, hard_weight=0.1)),
        Candidate("student-deep", DEEP_STUDENT, TrainPlan(16, weight_decay=0.1, hard_weight=0.1)),
    ),
    draft=Candidate("draft", DRAFT, TrainPlan(16, rows_per_step=32, weight_decay=0.05, hard_weight=0.0)),
)

_TINY = ModelShape(vocab_size=512, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64)
_QUICK = TrainPlan(epochs=2, rows_per_step=4, window=128)

SMOKE = Recipe(
    vocab_size=512,
    num_chats=2,
    comparisons=(Candidate("adamw-10m", _TINY, replace(_QUICK, muon_lr=0.0, core_epochs=1)),),
    teachers=tuple(
        Candidate(f"teacher-{seed}", replace(_TINY, dropout=0.1), replace(_QUICK, seed=seed)) for seed in (1, 2)
    ),
    pool=PoolPlan(text_epochs=2, plain_stories=8, chats=8, max_tokens=64, batch=4, top=8),
    students=(Candidate("student", _TINY, replace(_QUICK, hard_weight=0.2)),),
    draft=Candidate("draft", replace(_TINY, dim=16, mlp_dim=32), replace(_QUICK, hard_weight=0.0)),
)
SMOKE_STORIES = 60  # of each split
