"""Models that load anywhere: exported, checked, described, and published on the Hugging Face Hub."""

from hymba_tune.hub.exports import Exported, export

__all__ = ["Exported", "export"]
