// Printed by dev/kernels/main.cu (lab choose) from the times of each card: see choices.cuh.
// capability, {attention_forward, attention_backward, attention_float}
{0, {1, 1, 1}},
