"""Measurements of Marten against what else there is, on the machine at hand; scripts/bench runs them."""
