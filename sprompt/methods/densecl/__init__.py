"""Dense contrastive learning of a backbone from unlabelled pictures."""

from sprompt.methods.densecl.task import DenseCL, DenseCLConfig
from sprompt.methods.densecl.views import TwoViews, View, Views, collate_views

__all__ = ["DenseCL", "DenseCLConfig", "TwoViews", "View", "Views", "collate_views"]
