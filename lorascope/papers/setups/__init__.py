"""What arms train on besides tasks and models of `inputs`: planted teacher, pre-training text, scores of components."""
