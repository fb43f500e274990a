"""The embedded demo set: scenes, their pictures and their texts."""
