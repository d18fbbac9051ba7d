"""Features of a teacher at the patches that a student sees."""

from __future__ import annotations

from mimscale.config import RunConfig
from mimscale.contracts import TeacherInfo
from mimscale.errors import UserError


def check_grid(name: str, info: TeacherInfo, run: RunConfig) -> None:
    """Refuse a teacher whose patch tokens do not stand where the student's do. Raises UserError."""
    if info.grid != run.grid:
        raise UserError(
            f"teachers.{name} has a {info.grid[0]}x{info.grid[1]} grid at {info.image_size} px, the student "
            f"{run.grid[0]}x{run.grid[1]}; set teachers.{name}.image_size to "
            f"{run.grid[0] * info.image_size // info.grid[0]} so that the grids are equal"
        )
