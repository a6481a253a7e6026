"""Speed, memory and accuracy, measured the same way for every backend."""
