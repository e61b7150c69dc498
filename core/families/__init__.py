"""What a model is: where text enters it, what its layers do, how it is run. Data, no host needed."""
