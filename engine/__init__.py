"""One model replica: takes token ids, gives token ids; knows nothing of networks."""
