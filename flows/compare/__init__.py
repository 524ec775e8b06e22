"""Two runs compared: documents, tokens, distributions, and a page that shows them."""

from .comparison import Comparison, compare, compare_runs

__all__ = ["Comparison", "compare", "compare_runs"]
