"""QK-clip: after a step, attention heads whose logits grew too large get smaller q and k."""

from muonkit.qk_clip.clip import QKClip
from muonkit.qk_clip.logits import max_logits

__all__ = ["QKClip", "max_logits"]
