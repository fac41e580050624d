"""Building blocks of models, written over the Backend interface only."""
