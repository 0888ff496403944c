"""The words on the wire: generated from the .proto files beside this one (`make protos`)."""
