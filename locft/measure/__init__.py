"""What an edit did: answers to its questions, and its effect on what the model could do before."""
