"""The digits suite: six domains of real and rendered digits, built offline from the 1.5 MB pack beside it."""

from fedsim.data.digits.suite import DOMAINS, build_digits, load_digits

__all__ = ["DOMAINS", "build_digits", "load_digits"]
