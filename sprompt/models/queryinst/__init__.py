"""QueryInst: learned queries with boxes. Each stage reads the features of its boxes through layers that the queries make."""

from sprompt.models.queryinst.config import QueryInstConfig
from sprompt.models.queryinst.model import QueryInst

__all__ = ["QueryInst", "QueryInstConfig"]
