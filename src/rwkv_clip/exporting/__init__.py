"""Models for other programs: graphs of standard operators, checked against the model, and facts about their inputs."""
