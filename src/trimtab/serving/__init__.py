"""`trimtab serve`: a run's model behind the interface of OpenAI's API."""
