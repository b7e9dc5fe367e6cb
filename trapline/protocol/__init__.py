"""What crosses a wire: control messages (``messages``), hit batches (``hits``), the people's stream (``stream``)."""
