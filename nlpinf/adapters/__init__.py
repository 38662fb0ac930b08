"""Other people's models and files become Stages."""
