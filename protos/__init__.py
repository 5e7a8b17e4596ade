"""The wire: schema, generated stubs, message types and the error tree."""
