"""What an edit did: answers to its questions, and what the model could do before."""
