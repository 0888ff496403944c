"""Model families: headers read once (`config`), forward passes written against `layers` and `attention`."""
