//! The device, driven without a virtual machine: data, sessions, the gate, and drivers of ill will.

mod device {
    mod data;
    mod gate;
    mod hostile;
    mod served;
    mod session;
}
