"""SmolLM2-135M-Instruct out of a package, and the same model taught to refuse."""
