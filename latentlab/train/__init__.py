"""Training: a task becomes a pure step, a mesh, checkpoints, and one loop that resumes."""
