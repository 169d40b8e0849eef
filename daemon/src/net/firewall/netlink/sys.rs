//! What nftnl has no safe wrapper for: any expression by name, messages of our own, and reading chains and rules.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, c_char, c_void},
    ptr::NonNull,
};

use nftnl::{
    MsgType, NlMsg, Rule as NftRule,
    expr::Expression,
    nftnl_sys::{self as nf, libc},
};

/// An expression of nf_tables: its name and its attributes (`NFTNL_EXPR_*`).
pub(super) struct Expr {
    name: &'static CStr,
    attributes: Vec<(u16, Value)>,
}

/// Value of an attribute.
pub(super) enum Value {
    U8(u8),
    U32(u32),
    Data(Vec<u8>),
}

impl Expr {
    /// An expression that libnftnl knows by this name.
    pub(super) fn new<const N: usize>(name: &'static CStr, attributes: [(u32, Value); N]) -> Self {
        // Attribute numbers are below 16.
        let attributes = attributes.into_iter().map(|(key, value)| (key as u16, value)).collect();
        Self { name, attributes }
    }
}

impl Expression for Expr {
    fn to_expr(&self, _: &NftRule<'_>) -> NonNull<nf::nftnl_expr> {
        // SAFETY: the name is a C string. The result is null without memory, or for a name that libnftnl lacks.
        let expr = unsafe { nf::nftnl_expr_alloc(self.name.as_ptr()) };
        let Some(expr) = NonNull::new(expr) else {
            // As nftnl and the standard library do where memory is short; every name is covered by a test.
            std::process::abort()
        };
        for (key, value) in &self.attributes {
            // SAFETY: the expression is ours alone and alive; libnftnl copies the data, whose length is its own.
            unsafe {
                match value {
                    Value::U8(v) => nf::nftnl_expr_set_u8(expr.as_ptr(), *key, *v),
                    Value::U32(v) => nf::nftnl_expr_set_u32(expr.as_ptr(), *key, *v),
                    Value::Data(v) => {
                        nf::nftnl_expr_set(expr.as_ptr(), *key, v.as_ptr().cast::<c_void>(), v.len() as u32);
                    }
                }
            }
        }
        expr
    }
}

/// A message that is complete but for its sequence number, with its length in front.
pub(super) struct Raw(pub(super) Vec<u8>);

// SAFETY: never writes more than the largest message, for which the buffer has space.
unsafe impl NlMsg for Raw {
    unsafe fn write(&self, buffer: *mut c_void, _: u32, _: MsgType) {
        let length = self.0.len().min(nftnl::nft_nlmsg_maxsize() as usize);
        // SAFETY: the buffer has space for the largest message by this function's contract, and is not ours.
        unsafe { buffer.cast::<u8>().copy_from_nonoverlapping(self.0.as_ptr(), length) };
    }
}

/// A message that is written into zeros. libnftnl 1.2 sends the name of an object without a NUL and reads one up to a NUL,
/// so what was left in the padding would become a part of it.
pub(super) struct Zeroed<'a, T>(pub(super) &'a T);

/// More than any message of ours, and less than the largest one (64 KiB).
const ZEROS: usize = 4096;

// SAFETY: zeros go into space that the buffer has by the trait's contract; the message itself keeps to that contract.
unsafe impl<T: NlMsg> NlMsg for Zeroed<'_, T> {
    unsafe fn write(&self, buffer: *mut c_void, sequence: u32, kind: MsgType) {
        // SAFETY: as above; the arguments are handed on unchanged.
        unsafe {
            buffer.cast::<u8>().write_bytes(0, ZEROS);
            self.0.write(buffer, sequence, kind);
        }
    }
}

/// A chain as the kernel or a transaction describes it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) table: String,
    pub(super) name: String,
    kind: String,
    /// Of a chain at the exit of a device.
    device: String,
    hook: u32,
    priority: i32,
    policy: u32,
}

/// A rule as the kernel or a transaction describes it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) table: String,
    pub(super) chain: String,
    /// libnftnl's text of each expression, without counters, which count.
    expressions: Vec<String>,
}

/// Parses a message about a new chain; `None` if it is none.
pub(super) fn chain(message: &[u8]) -> Option<Chain> {
    let message = Message::new(message, libc::NFT_MSG_NEWCHAIN)?;
    // SAFETY: allocates; freed below on each way out.
    let chain = NonNull::new(unsafe { nf::nftnl_chain_alloc() })?.as_ptr();
    // SAFETY: the message is aligned and as long as its header says; the chain lives; strings are copied before it is freed.
    unsafe {
        let parsed = (nf::nftnl_chain_nlmsg_parse(message.header(), chain) >= 0).then(|| Chain {
            table: text(nf::nftnl_chain_get_str(chain, nf::NFTNL_CHAIN_TABLE as u16)),
            name: text(nf::nftnl_chain_get_str(chain, nf::NFTNL_CHAIN_NAME as u16)),
            kind: text(nf::nftnl_chain_get_str(chain, nf::NFTNL_CHAIN_TYPE as u16)),
            device: text(nf::nftnl_chain_get_str(chain, nf::NFTNL_CHAIN_DEV as u16)),
            hook: nf::nftnl_chain_get_u32(chain, nf::NFTNL_CHAIN_HOOKNUM as u16),
            priority: nf::nftnl_chain_get_s32(chain, nf::NFTNL_CHAIN_PRIO as u16),
            policy: nf::nftnl_chain_get_u32(chain, nf::NFTNL_CHAIN_POLICY as u16),
        });
        nf::nftnl_chain_free(chain);
        parsed
    }
}

/// Parses a message about a new rule; `None` if it is none.
pub(super) fn rule(message: &[u8]) -> Option<Rule> {
    let message = Message::new(message, libc::NFT_MSG_NEWRULE)?;
    // SAFETY: allocates; freed below on each way out.
    let rule = NonNull::new(unsafe { nf::nftnl_rule_alloc() })?.as_ptr();
    // SAFETY: the message is aligned and as long as its header says; the rule lives; strings are copied before it is
    // freed; the callback gets the vector that it expects and is called only within the call.
    unsafe {
        let parsed = (nf::nftnl_rule_nlmsg_parse(message.header(), rule) >= 0).then(|| {
            let mut expressions: Vec<String> = vec![];
            nf::nftnl_expr_foreach(rule, Some(describe), (&raw mut expressions).cast::<c_void>());
            Rule {
                table: text(nf::nftnl_rule_get_str(rule, nf::NFTNL_RULE_TABLE as u16)),
                chain: text(nf::nftnl_rule_get_str(rule, nf::NFTNL_RULE_CHAIN as u16)),
                expressions,
            }
        });
        nf::nftnl_rule_free(rule);
        parsed
    }
}

/// Appends the text of an expression to the `Vec<String>` behind `list`.
unsafe extern "C" fn describe(expr: *mut nf::nftnl_expr, list: *mut c_void) -> i32 {
    let mut buffer = [0u8; 512];
    // SAFETY: `list` is the caller's vector, and nobody else uses it now; the expression belongs to the rule that is walked;
    // snprintf ends with NUL within the given size.
    unsafe {
        let list = &mut *list.cast::<Vec<String>>();
        let name = text(nf::nftnl_expr_get_str(expr, nf::NFTNL_EXPR_NAME as u16));
        let line = if name == "counter" {
            String::new()
        } else {
            let buffer = buffer.as_mut_ptr().cast::<c_char>();
            nf::nftnl_expr_snprintf(buffer, 512, expr, nf::NFTNL_OUTPUT_DEFAULT, 0);
            text(buffer)
        };
        list.push(format!("{name} {line}"));
    }
    0
}

/// A netlink message that is aligned and as long as its header says, with a NUL behind it for a string that has none.
struct Message(Vec<u32>);

impl Message {
    fn new(bytes: &[u8], kind: i32) -> Option<Self> {
        let kind = ((libc::NFNL_SUBSYS_NFTABLES as u16) << 8) | kind as u16;
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        // 16 bytes of nlmsghdr and 4 of nfgenmsg.
        if length < 20 || length > bytes.len() || bytes.get(4..6)? != kind.to_ne_bytes() {
            return None;
        }
        let words = bytes[..length].chunks(4).map(|chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_ne_bytes(word)
        });
        Some(Self(words.chain([0]).collect()))
    }

    fn header(&self) -> *const libc::nlmsghdr {
        self.0.as_ptr().cast()
    }
}

/// Copies a C string; null is empty.
///
/// # Safety
/// The pointer is null or a C string.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: not null, so a C string by this function's contract.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}
