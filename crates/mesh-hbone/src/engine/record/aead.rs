//! AES-GCM (NIST SP 800-38D) as TLS 1.3 uses it: 12-byte nonces, a 16-byte tag behind the ciphertext, everything in place.
//!
//! One module per back end, all with the same two types. Which one [`Sealer`] and [`Opener`] are is decided below and nowhere else;
//! it is independent of who does the handshake's cryptography.

pub const NONCE: usize = 12;
pub const TAG: usize = 16;

/// A nonce that was refused, a key of the wrong length, or a tag that does not match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the record cipher refused")]
pub struct Refused;

/// The ciphers of both suites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    Aes128Gcm,
    Aes256Gcm,
}

impl Algorithm {
    pub fn key_len(self) -> usize {
        match self {
            Self::Aes128Gcm => 16,
            Self::Aes256Gcm => 32,
        }
    }
}

#[cfg(all(feature = "boring", not(feature = "monotonic-nonces")))]
pub use self::boring::{Opener, RESUMES, Sealer};
#[cfg(not(any(feature = "boring", feature = "monotonic-nonces")))]
pub use self::detected::{Opener, RESUMES, Sealer};
#[cfg(feature = "monotonic-nonces")]
pub use self::tls_record::{Opener, RESUMES, Sealer};

pub mod detected {
    //! What is faster on this processor. AWS-LC's AES-GCM needs AVX-512 to be fast and is then twice as fast as ring's; with VAES
    //! but no AVX-512, ring's is nearly twice as fast as AWS-LC's. Both kinds of machine are common.

    use super::{Algorithm, NONCE, Refused, TAG, aws_lc, ring};

    pub const RESUMES: bool = aws_lc::RESUMES && ring::RESUMES;

    #[derive(Debug)]
    pub enum Sealer {
        AwsLc(aws_lc::Sealer),
        Ring(Box<ring::Sealer>),
    }

    impl Sealer {
        /// # Errors
        /// The key has the wrong length.
        pub fn new(algorithm: Algorithm, key: &[u8]) -> Result<Self, Refused> {
            if ring_is_faster() {
                ring::Sealer::new(algorithm, key).map(Box::new).map(Self::Ring)
            } else {
                aws_lc::Sealer::new(algorithm, key).map(Self::AwsLc)
            }
        }

        /// Encrypts in place.
        ///
        /// # Errors
        /// More bytes than the algorithm allows.
        pub fn seal(&mut self, nonce: [u8; NONCE], aad: &[u8], in_out: &mut [u8]) -> Result<[u8; TAG], Refused> {
            match self {
                Self::AwsLc(sealer) => sealer.seal(nonce, aad, in_out),
                Self::Ring(sealer) => sealer.seal(nonce, aad, in_out),
            }
        }
    }

    #[derive(Debug)]
    pub enum Opener {
        AwsLc(aws_lc::Opener),
        Ring(Box<ring::Opener>),
    }

    impl Opener {
        /// # Errors
        /// The key has the wrong length.
        pub fn new(algorithm: Algorithm, key: &[u8]) -> Result<Self, Refused> {
            if ring_is_faster() {
                ring::Opener::new(algorithm, key).map(Box::new).map(Self::Ring)
            } else {
                aws_lc::Opener::new(algorithm, key).map(Self::AwsLc)
            }
        }

        /// Decrypts in place `in_out`, ciphertext and tag, and says how long the plaintext at its start is.
        ///
        /// # Errors
        /// The tag does not match, or there is none. `in_out` then holds nothing of use.
        pub fn open(&mut self, nonce: [u8; NONCE], aad: &[u8], in_out: &mut [u8]) -> Result<usize, Refused> {
            match self {
                Self::AwsLc(opener) => opener.open(nonce, aad, in_out),
                Self::Ring(opener) => opener.open(nonce, aad, in_out),
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn ring_is_faster() -> bool {
        !(is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("vaes")
            && is_x86_feature_detected!("vpclmulqdq"))
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn ring_is_faster() -> bool {
        false
    }
}

/// The two libraries' interfaces are the same to the letter: one text serves both.
macro_rules! less_safe {
    ($(#[$doc:meta])* $name:ident, $library:ident) => {
        $(#[$doc])*
        pub mod $name {
            use $library::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

            use super::{Algorithm, NONCE, Refused, TAG};

            /// A key may start at any sequence number.
            pub const RESUMES: bool = true;

            #[derive(Debug)]
            pub struct Sealer(LessSafeKey);

            impl Sealer {
                /// # Errors
                /// The key has the wrong length.
                pub fn new(algorithm: Algorithm, key: &[u8]) -> Result<Self, Refused> {
                    load(algorithm, key).map(Self)
                }

                /// Encrypts in place.
                ///
                /// # Errors
                /// More bytes than the algorithm allows.
                pub fn seal(&mut self, nonce: [u8; NONCE], aad: &[u8], in_out: &mut [u8]) -> Result<[u8; TAG], Refused> {
                    let nonce = Nonce::assume_unique_for_key(nonce);
                    let tag = self.0.seal_in_place_separate_tag(nonce, Aad::from(aad), in_out).map_err(|_| Refused)?;
                    tag.as_ref().try_into().map_err(|_| Refused)
                }
            }

            #[derive(Debug)]
            pub struct Opener(LessSafeKey);

            impl Opener {
                /// # Errors
                /// The key has the wrong length.
                pub fn new(algorithm: Algorithm, key: &[u8]) -> Result<Self, Refused> {
                    load(algorithm, key).map(Self)
                }

                /// Decrypts in place `in_out`, ciphertext and tag, and says how long the plaintext at its start is.
                ///
                /// # Errors
                /// The tag does not match, or there is none. `in_out` then holds nothing of use.
                pub fn open(&mut self, nonce: [u8; NONCE], aad: &[u8], in_out: &mut [u8]) -> Result<usize, Refused> {
                    let nonce = Nonce::assume_unique_for_key(nonce);
                    self.0.open_in_place(nonce, Aad::from(aad), in_out).map(|plain| plain.len()).map_err(|_| Refused)
                }
            }

            fn load(algorithm: Algorithm, key: &[u8]) -> Result<LessSafeKey, Refused> {
                let algorithm = match algorithm {
                    Algorithm::Aes128Gcm => &AES_128_GCM,
                    Algorithm::Aes256Gcm => &AES_256_GCM,
                };
                Ok(LessSafeKey::new(UnboundKey::new(algorithm, key).map_err(|_| Refused)?))
            }
        }
    };
}

less_safe!(
    /// AWS-LC, the nonce being the caller's responsibility.
    aws_lc,
    aws_lc_rs
);

less_safe!(
    /// ring, the nonce being the caller's responsibility.
    ring,
    ring
);

pub mod tls_record {
    //! AWS-LC's keys for TLS records: the module itself sees to it that nonces only go up, which is what its FIPS 140-3 policy asks
    //! for. It takes the first nonce for that of sequence number 0 (RFC 8446 §5.3), so a key cannot be taken up in the middle.

    use aws_lc_rs::aead::{
        AES_128_GCM, AES_256_GCM, Aad, Nonce, TlsProtocolId, TlsRecordOpeningKey, TlsRecordSealingKey,
    };

    use super::{Algorithm, NONCE, Refused, TAG};

    /// A key has to start at sequence number 0.
    pub const RESUMES: bool = false;

    #[derive(Debug)]
    pub struct Sealer(TlsRecordSealingKey);

    impl Sealer {
        /// # Errors
        /// The key has the wrong length.
        pub fn new(algorithm: Algorithm, key: &[u8]) -> Result<Self, Refused> {
            TlsRecordSealingKey::new(select(algorithm), TlsProtocolId::TLS13, key).map(Self).map_err(|_| Refused)
        }

        /// Encrypts in place.
        ///
        /// # Errors
        /// The nonce's sequence number is not above that of the last one.
        pub fn seal(&mut self, nonce: [u8; NONCE], aad: &[u8], in_out: &mut [u8]) -> Result<[u8; TAG], Refused> {
            let nonce = Nonce::assume_unique_for_key(nonce);
            let tag = self.0.seal_in_place_separate_tag(nonce, Aad::from(aad), in_out).map_err(|_| Refused)?;
            tag.as_ref().try_into().map_err(|_| Refused)
        }
    }

    #[derive(Debug)]
    pub struct Opener(TlsRecordOpeningKey);

    impl Opener {
        /// # Errors
        /// The key has the wrong length.
        pub fn new(algorithm: Algorithm, key: &[u8]) -> Result<Self, Refused> {
            TlsRecordOpeningKey::new(select(algorithm), TlsProtocolId::TLS13, key).map(Self).map_err(|_| Refused)
        }

        /// Decrypts in place `in_out`, ciphertext and tag, and says how long the plaintext at its start is.
        ///
        /// # Errors
        /// The tag does not match, or there is none. `in_out` then holds nothing of use.
        pub fn open(&mut self, nonce: [u8; NONCE], aad: &[u8], in_out: &mut [u8]) -> Result<usize, Refused> {
            let nonce = Nonce::assume_unique_for_key(nonce);
            self.0.open_in_place(nonce, Aad::from(aad), in_out).map(|plain| plain.len()).map_err(|_| Refused)
        }
    }

    fn select(algorithm: Algorithm) -> &'static aws_lc_rs::aead::Algorithm {
        match algorithm {
            Algorithm::Aes128Gcm => &AES_128_GCM,
            Algorithm::Aes256Gcm => &AES_256_GCM,
        }
    }
}

#[cfg(feature = "boring")]
pub mod boring {
    //! BoringSSL, the nonce being the caller's responsibility.

    use std::fmt;

    use boring::aead::AeadCtx;

    use super::{Algorithm, NONCE, Refused, TAG};

    /// A key may start at any sequence number.
    pub const RESUMES: bool = true;

    pub struct Sealer(AeadCtx);

    impl Sealer {
        /// # Errors
        /// The key has the wrong length.
        pub fn new(algorithm: Algorithm, key: &[u8]) -> Result<Self, Refused> {
            load(algorithm, key).map(Self)
        }

        /// Encrypts in place.
        ///
        /// # Errors
        /// More bytes than the algorithm allows.
        pub fn seal(&mut self, nonce: [u8; NONCE], aad: &[u8], in_out: &mut [u8]) -> Result<[u8; TAG], Refused> {
            let mut tag = [0; TAG];
            match self.0.seal_in_place_mut(&nonce, in_out, &mut tag, aad) {
                Ok(written) if written.len() == TAG => Ok(tag),
                _ => Err(Refused),
            }
        }
    }

    pub struct Opener(AeadCtx);

    impl Opener {
        /// # Errors
        /// The key has the wrong length.
        pub fn new(algorithm: Algorithm, key: &[u8]) -> Result<Self, Refused> {
            load(algorithm, key).map(Self)
        }

        /// Decrypts in place `in_out`, ciphertext and tag, and says how long the plaintext at its start is.
        ///
        /// # Errors
        /// The tag does not match, or there is none. `in_out` then holds nothing of use.
        pub fn open(&mut self, nonce: [u8; NONCE], aad: &[u8], in_out: &mut [u8]) -> Result<usize, Refused> {
            let (text, tag) = in_out.split_last_chunk_mut::<TAG>().ok_or(Refused)?;
            self.0.open_in_place_mut(&nonce, text, &tag[..], aad).map_err(|_| Refused)?;
            Ok(text.len())
        }
    }

    impl fmt::Debug for Sealer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("Sealer").finish_non_exhaustive()
        }
    }

    impl fmt::Debug for Opener {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("Opener").finish_non_exhaustive()
        }
    }

    fn load(algorithm: Algorithm, key: &[u8]) -> Result<AeadCtx, Refused> {
        let algorithm = match algorithm {
            Algorithm::Aes128Gcm => boring::aead::Algorithm::aes_128_gcm(),
            Algorithm::Aes256Gcm => boring::aead::Algorithm::aes_256_gcm(),
        };
        AeadCtx::new_default_tag(&algorithm, key).map_err(|_| Refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AAD: &[u8] = b"header";

    fn nonce(sequence: u8) -> [u8; NONCE] {
        let mut nonce = [0x42; NONCE];
        nonce[NONCE - 1] ^= sequence;
        nonce
    }

    /// NIST's GCM test case 14: one block of zeros under a 256-bit key and a nonce of zeros.
    const CASE_14: (&[u8; 16], &[u8; TAG]) = (
        b"\xce\xa7\x40\x3d\x4d\x60\x6b\x6e\x07\x4e\xc5\xd3\xba\xf3\x9d\x18",
        b"\xd0\xd1\xc8\xa7\x99\x99\x6b\xf0\x26\x5b\x98\xb5\xd4\x8a\xb9\x19",
    );

    macro_rules! back_end {
        ($module:ident) => {
            mod $module {
                use super::{
                    super::$module::{Opener, RESUMES, Sealer},
                    *,
                };

                #[test]
                fn computes_aes_gcm() {
                    let mut block = [0; 16];
                    let mut sealer = Sealer::new(Algorithm::Aes256Gcm, &[0; 32]).unwrap();
                    let tag = sealer.seal([0; NONCE], &[], &mut block).unwrap();
                    assert_eq!((&block, &tag), CASE_14);
                }

                #[test]
                fn what_was_sealed_is_opened_and_nothing_else() {
                    for algorithm in [Algorithm::Aes128Gcm, Algorithm::Aes256Gcm] {
                        let key = &[9; 32][..algorithm.key_len()];
                        let mut sealer = Sealer::new(algorithm, key).unwrap();
                        let mut opener = Opener::new(algorithm, key).unwrap();
                        for length in [0, 1, 15, 16, 17, 255, 1024, 16_385] {
                            let sequence = u8::try_from(length % 251).unwrap();
                            let Ok(tag) = sealer.seal(nonce(sequence), AAD, &mut vec![7; length]) else {
                                assert!(!RESUMES, "{length}");
                                continue;
                            };
                            let mut sealer = Sealer::new(algorithm, key).unwrap();
                            let mut sealed = vec![7; length];
                            assert_eq!(sealer.seal(nonce(sequence), AAD, &mut sealed), Ok(tag), "deterministic");
                            sealed.extend(tag);
                            let mut other = sealed.clone();
                            assert_eq!(opener.open(nonce(sequence), AAD, &mut other), Ok(length));
                            assert_eq!(other[..length], vec![7; length]);
                            assert_eq!(opener.open(nonce(sequence), b"footer", &mut sealed.clone()), Err(Refused));
                            assert_eq!(opener.open(nonce(sequence ^ 1), AAD, &mut sealed.clone()), Err(Refused));
                            sealed[length / 2] ^= 1;
                            assert_eq!(opener.open(nonce(sequence), AAD, &mut sealed), Err(Refused));
                        }
                        for length in 0..TAG {
                            assert_eq!(opener.open(nonce(0), AAD, &mut vec![7; length]), Err(Refused));
                        }
                        assert!(Sealer::new(algorithm, &[9; 24]).is_err());
                        assert!(Opener::new(algorithm, &[9; 24]).is_err());
                    }
                }

                /// One that does not resume refuses a number it has passed, and gets lost when it starts anywhere but at 0.
                #[test]
                fn says_whether_it_can_start_in_the_middle() {
                    let fresh = || Sealer::new(Algorithm::Aes128Gcm, &[9; 16]).unwrap();
                    let mut sealer = fresh();
                    let going_on = |sealer: &mut Sealer, numbers: [u8; 3]| {
                        numbers.map(|number| sealer.seal(nonce(number), AAD, &mut [0]).is_ok())
                    };
                    assert_eq!(going_on(&mut sealer, [0, 1, 2]), [true; 3]);
                    assert_eq!(sealer.seal(nonce(2), AAD, &mut [0]).is_ok(), RESUMES);
                    assert_eq!(going_on(&mut fresh(), [4, 11, 12]), [true, true, RESUMES]);
                }
            }
        };
    }

    back_end!(detected);
    back_end!(aws_lc);
    back_end!(tls_record);
    back_end!(ring);
    #[cfg(feature = "boring")]
    back_end!(boring);
}
