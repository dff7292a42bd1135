"""Pages and programs that a build writes are not tests."""

from __future__ import annotations

collect_ignore = ["_build", "_ext", "gallery"]
