"""What a LongLLaVA model can do, measured."""
