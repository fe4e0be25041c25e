"""Teachers: where the predictions of a batch come from. A mode is one class, and a row of `MODES`."""

from fastkd.teachers.following import EMA, Snapshot
from fastkd.teachers.given import Cached, Frozen
from fastkd.teachers.learning import Mutual, Online
from fastkd.teachers.mode import TeacherMode
from fastkd.teachers.several import Mixed, Routed
from fastkd.teachers.views import VIEWS, MultiView

__all__ = [
    "EMA",
    "MODES",
    "VIEWS",
    "Cached",
    "Frozen",
    "Mixed",
    "MultiView",
    "Mutual",
    "Online",
    "Routed",
    "Snapshot",
    "TeacherMode",
]

#: Name → class.
MODES: dict[str, type[TeacherMode]] = {
    "frozen": Frozen,
    "cached": Cached,
    "online": Online,
    "mutual": Mutual,
    "ema": EMA,
    "snapshot": Snapshot,
    "multi_view": MultiView,
    "mixture": Mixed,
    "routed": Routed,
}
