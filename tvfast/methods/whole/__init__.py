"""Methods that merge whole tensors with torch, outside the stage algebra."""
