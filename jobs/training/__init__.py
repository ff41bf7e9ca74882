"""The training loop and how Ray Train launches it."""
