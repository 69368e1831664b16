"""Models and texts of arms that `inputs` does not have: a planted teacher, and pre-training."""
