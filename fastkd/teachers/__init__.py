"""Teachers: where the predictions of a batch come from. A mode is one class."""

from fastkd.teachers.given import Cached, Frozen
from fastkd.teachers.mode import TeacherMode

__all__ = ["Cached", "Frozen", "TeacherMode"]
