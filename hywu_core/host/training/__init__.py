"""Training inside the host: the objective on any MODEL, pairs, runs, previews, evaluation."""
