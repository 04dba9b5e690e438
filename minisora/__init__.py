"""minisora: from DALL·E 1 to Sora in one small world of captioned sprites."""

__version__ = "0.1.0"
