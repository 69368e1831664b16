"""Many runs side by side, and measurements of a step or of a trained state."""
