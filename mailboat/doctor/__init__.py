"""`mailboat doctor`: looks at everything a coordinator or a site needs, and changes nothing."""

from __future__ import annotations

from mailboat.doctor.checks import examine
from mailboat.doctor.finding import Finding, status_of

__all__ = ["Finding", "examine", "status_of"]
