"""What a run starts from: models, tasks, texts and images."""
