"""How the embedded base was made: drawings, captions and the training stages."""
