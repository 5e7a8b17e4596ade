"""What a training looks at: photographs, decoded once, cropped and disturbed at random."""
